"""The commands that are no benchmarks: one module each, named as the command is.

`vertebra.__main__` puts them together. What takes long to import is imported inside a command.
"""
