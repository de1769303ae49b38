"""Low-rank repair: a branch beside the codes, or an adapter on them, that makes up for the rounding error."""
