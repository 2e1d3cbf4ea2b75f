"""The commands, one file a verb: parse, build, call, print."""
