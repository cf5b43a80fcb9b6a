"""The commands of the zoo, one short file each."""
