"""The subcommands, one file each: a ``COMMAND`` that :mod:`bdfast.cli.program` lists."""
