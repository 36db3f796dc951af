"""What README's figures come from: each module measures one part of PistoSeg beside what a user would use instead."""
