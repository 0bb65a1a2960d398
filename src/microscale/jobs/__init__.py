"""Jobs: one file for each, an options record in and a result record out; Python and the command line both call them."""
