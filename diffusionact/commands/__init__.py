"""The subcommands, one file or folder each: HELP, `options(parser)` and `run(arguments)` -> exit status.

The only files that know all sub-packages. Each imports them inside `run`, so that --help loads
neither NumPy nor torch; a new command is a file here and a line in cli.COMMANDS.
"""
