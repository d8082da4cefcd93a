"""Pruning the algorithm that multiplies: products of blocks and additions are left out, and weights stay.

    ``layers``  a layer in blocks  ->  ``gates`` on its products and terms  ->  ``criteria``, or ``gate_training``, say which close
    ->  ``network`` closes them, trains what is left and writes it, ``mean_correction`` keeps the biases right  ->  ``report``

``prune_products`` (``api``) takes all of these steps. It shares examples, training and costs with ``fxcompress.pruning``.
"""
