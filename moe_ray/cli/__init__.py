"""The command line: `main` is the tree, `parser` its arguments, and each command has a module that does its work."""
