"""Commands as modules: `python -m experiments.train` is `megatransformer train`."""

import os

# inspect.py and lm_eval.py stand in names/: next to the scripts they would hide the modules of the
# same names from every script that is started as `python experiments/train.py`.
__path__.append(os.path.join(__path__[0], "names"))
