"""Architecture evolution: latency and value of each block, and which are removed or copied. Sec. 3.1."""
