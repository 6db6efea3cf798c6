"""Several processes: what the launcher leaves out."""

import logging

from finetune import launch


def test_torch_says_nothing_of_signals_and_failed_ranks():
    import torch.distributed.launcher.api  # noqa: F401 - what start_ranks imports

    logger = logging.getLogger("torch.distributed.elastic.agent.server.api")
    logger.setLevel(logging.WARNING)  # as torch sets it
    launch.quiet_elastic()
    assert not logger.isEnabledFor(logging.WARNING)
