"""Text in, statistics out: texts, token windows, statistics and ranges of layer inputs. Knows no algorithm."""
