"""Importing this puts our kernels into verl, in the process that imports it.

verl imports what a config names in every worker that holds a model:

    actor_rollout_ref.model.external_lib=crpo_kernels.integrations.verl_patch
    actor_rollout_ref.model.use_fused_kernels=True
"""

from crpo_kernels.integrations.verl import patch

patch()
