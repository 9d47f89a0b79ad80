"""Floor 7: the command line. One table: verb -> function; nothing is computed here."""
