"""Adapter files in the layouts of the field, and one road through them.

    file → ``source`` (by the keys of ``keys``) → ``layer.Layer`` → ``writers``, ``folders``

A layer is read, converted and written before the next one is touched.
"""
