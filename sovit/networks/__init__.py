"""Networks by name: importing these modules puts them into timm's registry."""
