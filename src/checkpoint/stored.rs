//! Matches stored tensors to the schema: name prefixes, optional biases, the output head, and a check that no tensor is
//! left unread.

use super::{rows, Checkpoint, Store};
use crate::error::{Error, Result};
use crate::family::{Naming, PLAIN};
use crate::spec::{ModelSpec, RopeScaling};
use crate::tensors::{LayerTensors, Schema, TensorSpec};
use candle_core::Device;
use std::collections::BTreeSet;

/// Bytes compared at a time.
const CHUNK: usize = 16 << 20;

/// Suffix of transformers' buffers that are computed from the configuration.
const DERIVED: &str = "rotary_emb.inv_freq";

impl Store {
    /// Returns the names of all stored tensors; random weights have none.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Shards(s) => Box::new(s.names()),
            Self::Gguf(g) => Box::new(g.names()),
            Self::Random(_) => Box::new(std::iter::empty()),
        }
    }

    /// Sets the bias flags of `spec` for the biases that a GGUF file stores; its metadata has no key for them.
    pub(super) fn add_stored_biases(&self, spec: &mut ModelSpec) {
        let Self::Gguf(file) = self else { return };
        let mut all = spec.clone();
        all.attention_mut().for_each(|a| (a.qkv_bias, a.out_bias) = (true, true));
        all.layers.iter_mut().for_each(|l| l.feed_forward.bias = true);
        let schema = Schema::new(&all);
        let stored = |bias: &Option<TensorSpec>| bias.as_ref().is_some_and(|b| file.info(&b.gguf).is_some());
        let tensors = schema.layers.iter().filter_map(LayerTensors::attention);
        for (attention, t) in spec.attention_mut().zip(tensors) {
            attention.qkv_bias |= [&t.q, &t.k, &t.v].iter().any(|l| stored(&l.bias));
            attention.out_bias |= stored(&t.out.bias);
        }
        for (layer, t) in spec.layers.iter_mut().zip(&schema.layers) {
            layer.feed_forward.bias |= [&t.gate, &t.up, &t.down].iter().any(|l| stored(&l.bias));
        }
    }
}

impl Checkpoint {
    /// Matches the schema to the stored tensors.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or is stored but not read.
    pub(super) fn match_tensors(&mut self) -> Result<()> {
        if matches!(self.store, Store::Random(_)) {
            return Ok(());
        }
        self.naming = self.find_naming();
        let mut read: BTreeSet<String> = self.read_rope_factors()?.into_iter().collect();
        read.extend(self.find_head()?);
        for tensor in self.schema.iter() {
            self.expect(tensor)?;
            read.insert(self.stored_name(tensor));
        }
        self.refuse_unread(&read)
    }

    fn find_naming(&self) -> Naming {
        let named = |n: &&Naming| {
            let Store::Shards(shards) = &self.store else { return false };
            [&self.schema.embed, &self.schema.norm].iter().any(|t| shards.info(&n.apply(&t.name)).is_some())
        };
        self.family.namings.iter().find(named).copied().unwrap_or(PLAIN)
    }

    /// Reads `rope_freqs.weight`, the divisors of the rotary frequencies by which GGUF files store Llama 3's scaling,
    /// and returns its name if it is stored.
    fn read_rope_factors(&mut self) -> Result<Option<String>> {
        let factors = TensorSpec::rope_factors(self.spec.head_dim() / 2);
        let stored = matches!(self.store, Store::Gguf(_)) && self.info(&factors).is_some();
        if !(stored && self.family.gguf.rope_factors) {
            return Ok(None);
        }
        if self.spec.ropes[0].scaling != RopeScaling::None {
            let message = format!("has both tensor `{}` and a rope scaling in the metadata", factors.gguf);
            return Err(Error::unsupported(self.identity.place(), message));
        }
        let divisors = self.vector(&factors, &Device::Cpu)?.to_vec1::<f32>()?;
        self.spec.ropes[0].scaling = RopeScaling::Factors { divisors };
        Ok(Some(factors.gguf))
    }

    /// Resolves the head of a tied model whose file stores one nevertheless, as transformers 5 does: equal copies count
    /// as one matrix, different matrices untie the model, and a head without an embedding serves as both. Returns the
    /// name of a copy that is not read.
    fn find_head(&mut self) -> Result<Option<String>> {
        let head = TensorSpec::head(&self.spec);
        if !self.spec.tied || self.info(&head).is_none() {
            return Ok(None);
        }
        let name = self.stored_name(&head);
        if self.info(&self.schema.embed).is_none() {
            self.schema.embed = head;
            return Ok(None);
        }
        if self.same_values(&head, &self.schema.embed)? {
            return Ok(Some(name));
        }
        let embed = self.stored_name(&self.schema.embed);
        self.warn(format!(
            "{}: `tie_word_embeddings` is true, but `{name}` and `{embed}` differ: both are used, as in transformers",
            self.identity.place()
        ));
        self.spec.tied = false;
        self.schema.head = Some(head);
        Ok(None)
    }

    fn same_values(&self, a: &TensorSpec, b: &TensorSpec) -> Result<bool> {
        let (x, y) = (self.expect(a)?, self.expect(b)?);
        let (count, width) = (a.shape[0], a.shape[1]);
        let step = (CHUNK / (4 * width)).max(1);
        for first in (0..count).step_by(step) {
            let rows = first..count.min(first + step);
            if rows::decode(self, x, rows.clone(), width)? != rows::decode(self, y, rows, width)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Checks that every stored tensor is read, or is known not to affect the logits of text.
    fn refuse_unread(&mut self, read: &BTreeSet<String>) -> Result<()> {
        let parts = self.family.wrapper.as_ref().map_or(&[][..], |w| w.other_parts);
        let (mut unread, mut other) = (vec![], 0usize);
        // Blocks after the last layer predict several tokens at once.
        let (layers, more) = (self.spec.layers.len(), self.config.opt_size("mtp_num_hidden_layers").ok().flatten());
        let beyond = |name: &str| {
            let block = name.strip_prefix("blk.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
            block.is_some_and(|i| (layers..layers + more.unwrap_or(0)).contains(&i))
        };
        for name in self.store.names().filter(|n| !read.contains(*n) && !n.ends_with(DERIVED)) {
            match beyond(name) || parts.iter().any(|p| name.starts_with(p)) {
                true => other += 1,
                false => unread.push(format!("`{name}`")),
            }
        }
        let place = self.identity.place();
        match unread.len() {
            0 => {}
            1 => {
                let message = format!("unknown tensor {}; it may change the model's outputs", unread[0]);
                return Err(Error::tensor(place, message));
            }
            n => {
                let message = format!("{n} unknown tensors; they may change the model's outputs");
                let some = unread[..n.min(4)].join(", ");
                return Err(Error::tensor(place, format!("{message}: {some}{}", if n > 4 { ", ..." } else { "" })));
            }
        }
        if other > 0 {
            self.warn(format!(
                "{place}: text only; {other} tensors of other parts ({}) are not loaded",
                parts.join(", ")
            ));
        }
        Ok(())
    }
}
