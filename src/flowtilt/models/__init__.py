"""Model families: everything that is particular to one network, one file each."""
