"""The ways to build experts, a file each, under the name that their settings have in ``moe``.

Each file has ``WALK``, what it is shown of a layer (:mod:`dive.moe.walk`), and ``layer``, what it makes of it. A way of your own
is a file here, a class of settings with a field of that name in :class:`dive.config.MoEConfig`, and a preset in ``conf/moe``.
"""
