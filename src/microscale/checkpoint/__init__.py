"""Files: validating reader, atomic writer, our layout and those of other tools. Knows no modules."""
