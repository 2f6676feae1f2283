"""The papers' claims on real data: what holds, with numbers and error bars. `make reproduce` runs it."""
