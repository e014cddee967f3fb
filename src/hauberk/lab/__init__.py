"""The miniature world: objects, scenes, a language, and the recipe that trains lab models on it.

Everything here is synthetic.  The "harmful" answers are the same empty templates as the
harmless ones ("take some steel and shape it"), so nothing in the lab instructs anybody.
"""
