"""Other trainers' settings: their names, and what they are here."""
