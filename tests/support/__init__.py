"""What tests and the programs that they run share."""

import gc

# Tracing makes objects by the million and keeps them: to look through all of them again and again
# for garbage took a sixth of the time of tests.
gc.set_threshold(50_000, 20, 20)
