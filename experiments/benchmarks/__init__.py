"""What parts of the programs take, measured."""
