"""Below every floor: the user's-mistake exception, atomic files, progress."""
