"""Keeps three false alarms of other libraries off the screen; imported before them, for this effect alone.

bitsandbytes offers a kernel that is not needed, transformers misses torchvision, which diffusers' pipelines can do
without, and it announces how it fills rows of a token table that are overwritten at once.
"""

import logging


FALSE_ALARMS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back",
    "transformers.modeling_utils": "new embeddings will be initialized from a multivariate normal",
}


def is_no_false_alarm(record):
    return FALSE_ALARMS[record.name] not in record.getMessage()


for name in FALSE_ALARMS:
    logging.getLogger(name).addFilter(is_no_false_alarm)
