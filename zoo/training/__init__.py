"""What every LightningModule of the zoo shares."""
