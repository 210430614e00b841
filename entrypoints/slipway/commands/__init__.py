"""The commands, one file each: arguments in, one call of the library, one summary out. cli.py lists them."""
