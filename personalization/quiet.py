"""Keeps processes and their screens quiet; imported before the libraries that it is about, for this effect alone.

Threads that have nothing to do sleep. torch's would wait for each other in a busy loop; beside other work two of them
took five times as long as one thread then, and as long as one where they sleep. Its tensors of 2 MB and more ask Linux
for huge pages, which come quickly, so that what is freed need not be kept (`memory.keep_freed_memory`).

Three false alarms stay off the screen: bitsandbytes offers a kernel that is not needed, transformers misses
torchvision, which diffusers' pipelines can do without, and it announces how it fills rows of a token table that are
overwritten at once.
"""

import logging
import os


# Both are read when torch is imported; processes that are started inherit them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

FALSE_ALARMS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back",
    "transformers.modeling_utils": "new embeddings will be initialized from a multivariate normal",
}


def is_no_false_alarm(record):
    return FALSE_ALARMS[record.name] not in record.getMessage()


for name in FALSE_ALARMS:
    logging.getLogger(name).addFilter(is_no_false_alarm)
