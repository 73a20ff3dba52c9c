"""What stands below everything else, and knows no BERT. Importing it before torch sets how threads wait."""

import os

# By default OpenMP's threads spin while they wait, and on a busy machine take the cores from those that work: `make smoke`'s
# model on two busy cores made under 1,000 tokens/s, and 7,600 with threads that sleep. A GPU run does not notice.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
