"""Pictures fetched from the open web by img2dataset, in the environment that it has for itself.

What is here runs there: it imports the standard library, img2dataset, and nothing else of ours.
"""
