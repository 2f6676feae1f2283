"""What deepspectra costs and how right it is, beside its peers: one run, one process, one table. `make bench`."""
