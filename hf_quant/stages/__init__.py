"""The stages of a recipe, one file each: the protocol and its plain default. A method pins some and leaves the rest."""
