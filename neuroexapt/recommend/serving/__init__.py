"""A recommender behind HTTP. Needs the packages of the extra ``serve``."""
