"""Pairs of images of which people, or a reward, preferred one: what they are, and the files that they come from."""

from flowtilt.preferences.files import read_preferences
from flowtilt.preferences.pair import Pair, Picture, Preferences

__all__ = ["Pair", "Picture", "Preferences", "read_preferences"]
