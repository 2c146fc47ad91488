"""Who finds faces, masks, quality, embeddings and captions.

Each is a ``Provider``: called with photos, it answers each, or says nothing (None) and the next one
of its role is asked. Side files and columns come first, then a model of a local folder.
"""
