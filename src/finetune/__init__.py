"""Supervised fine-tuning for images: a pretrained backbone, a new head, your labels."""

import time

STARTED = time.time()  # of the process, as near as a package can tell; for time_to_first_step
