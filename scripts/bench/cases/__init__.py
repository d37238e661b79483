"""One file a case; each has SIDES: name -> function of the options that returns numbers."""
