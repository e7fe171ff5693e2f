"""Parts of benchmarks/head_to_head.py: what is compared, how runs are made, what is measured of them, what is written."""
