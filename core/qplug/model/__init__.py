"""The parts of a model (blocks, groups, experts, residual stream), found without its weights."""
