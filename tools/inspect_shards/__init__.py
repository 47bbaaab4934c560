"""`inspect-shards`: what a data set holds, and whether its bytes are sound."""
