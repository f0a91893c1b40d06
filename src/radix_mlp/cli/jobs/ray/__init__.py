"""Jobs of the command line on a Ray cluster: counted, cut into parts by token prefixes, run part by part."""
