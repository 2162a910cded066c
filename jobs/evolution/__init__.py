"""Architecture evolution (SnapFusion Alg. 1) and its random baseline."""
