"""What every model can do, by subject: hear, write, know words, decode."""
