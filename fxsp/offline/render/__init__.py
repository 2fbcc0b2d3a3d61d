"""An explanation on one screen and as a page."""
