"""Architecture evolving: what blocks take, what they are worth, and which go or come. SnapFusion Sec. 3.1."""
