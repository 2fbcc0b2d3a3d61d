"""emit: fxsp ops become ATen and functional collectives, after AOTAutograd."""
