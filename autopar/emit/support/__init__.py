"""The training loop of an emitted package: these modules are copied into it, with what they use of `autopar.ops` and its like.

They read tables that were written by `autopar.emit.tables`, and import nothing but torch and modules that are copied too.

Modules, in reading order: ``described``, ``ranks``, ``stored``, ``gradients``, ``whole``, ``staged``, ``assembled``, ``updates``,
``command``.
"""
