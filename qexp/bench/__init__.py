"""`qexp bench`: what a training step and a packed network cost, as ratios to float."""
