//! A process's place among the ranks of a run, from the variables that torchrun or Slurm set.

use crate::error::{Error, Result};

/// A rank and where the ranks meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub count: usize,
    /// Rank among those of this machine: the index of its GPU.
    pub local: usize,
    /// Host of rank 0.
    pub host: String,
    /// Port on which rank 0 listens.
    pub port: u16,
}

impl Place {
    /// The place that the variables in `get` give: torchrun's `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and
    /// `MASTER_PORT` ([source](https://docs.pytorch.org/docs/stable/elastic/run.html)), else Slurm's `SLURM_PROCID`,
    /// `SLURM_NTASKS` and `SLURM_LOCALID` ([source](https://slurm.schedmd.com/srun.html)) with `MASTER_ADDR` and
    /// `MASTER_PORT`, which default to this machine and to a port from `SLURM_JOB_ID` where all tasks are on one node.
    /// `None` without either, or with one rank.
    ///
    /// torchrun itself listens on `MASTER_PORT`: the ranks meet on the next one.
    ///
    /// # Errors
    /// A variable that is missing or is no number, by name; a rank beyond the number of ranks.
    pub fn of(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<usize> {
            let text =
                get(name).ok_or_else(|| Error::usage(name, "is not set, other variables of the launcher are"))?;
            text.trim().parse().map_err(|_| Error::usage(name, format!("{text:?} is not a number")))
        };
        let torchrun = ["RANK", "WORLD_SIZE", "LOCAL_RANK"];
        let slurm = ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"];
        let (names, by_slurm) = if torchrun[..2].iter().any(|n| get(n).is_some()) {
            (torchrun, false)
        } else if slurm[..2].iter().all(|n| get(n).is_some()) {
            (slurm, true)
        } else {
            return Ok(None);
        };
        let (rank, count) = (number(names[0])?, number(names[1])?);
        if rank >= count {
            return Err(Error::usage(names[0], format!("{rank} of {count} ranks")));
        }
        if count == 1 {
            return Ok(None);
        }
        let one_node = by_slurm && get("SLURM_NNODES").or_else(|| get("SLURM_JOB_NUM_NODES")).as_deref() == Some("1");
        let (host, port) = if one_node && get("MASTER_ADDR").is_none() {
            let job = get("SLURM_JOB_ID").and_then(|id| id.parse::<u64>().ok()).unwrap_or(0);
            ("127.0.0.1".to_string(), 29_500 + (job % 10_000) as u16)
        } else {
            let host =
                get("MASTER_ADDR").ok_or_else(|| Error::usage("MASTER_ADDR", "is not set: the host of rank 0"))?;
            let port = number("MASTER_PORT")?;
            (host, u16::try_from(port).map_err(|_| Error::usage("MASTER_PORT", format!("{port} is not a port")))?)
        };
        let port = port.checked_add(1).ok_or_else(|| Error::usage("MASTER_PORT", "the next port is used, 65536"))?;
        Ok(Some(Self { rank, count, local: number(names[2])?, host, port }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Place>> {
        Place::of(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn torchruns_variables_come_first() -> Result<()> {
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node7"),
            ("MASTER_PORT", "29400"),
        ];
        let want = Place { rank: 3, count: 4, local: 1, host: "node7".into(), port: 29_401 };
        assert_eq!(of(&torchrun)?, Some(want.clone()));
        let slurm = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "0")];
        assert_eq!(of(&[&torchrun[..], &slurm[..]].concat())?, Some(want));
        Ok(())
    }

    #[test]
    fn slurm_on_one_node_needs_no_address() -> Result<()> {
        let slurm = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "1")];
        let one = [&slurm[..], &[("SLURM_NNODES", "1"), ("SLURM_JOB_ID", "40017")]].concat();
        let want = Place { rank: 1, count: 2, local: 1, host: "127.0.0.1".into(), port: 29_518 };
        assert_eq!(of(&one)?, Some(want));
        let two = [&slurm[..], &[("SLURM_NNODES", "2")]].concat();
        assert!(of(&two).is_err_and(|e| e.to_string().contains("MASTER_ADDR")));
        Ok(())
    }

    #[test]
    fn one_rank_and_no_launcher_are_no_ranks() -> Result<()> {
        assert_eq!(of(&[])?, None);
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")])?, None);
        Ok(())
    }

    #[test]
    fn faults_are_named() {
        for (variables, want) in [
            (&[("RANK", "4"), ("WORLD_SIZE", "4")][..], "RANK: 4 of 4 ranks"),
            (&[("RANK", "0")], "WORLD_SIZE: is not set"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK: \"x\" is not a number"),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "70000")],
                "MASTER_PORT: 70000",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")],
                "LOCAL_RANK: is not set",
            ),
        ] {
            let message = of(variables).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(want), "{message}");
        }
    }
}
