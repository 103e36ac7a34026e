"""Benchmarks: pgqueue beside its peers and beside what PostgreSQL does at best (`make bench`)."""
