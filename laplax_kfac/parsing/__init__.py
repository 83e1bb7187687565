"""The layer parser: from a model's jaxpr to its layers.

In goes a model, its parameters and one example; out comes a `program.Program`, the traced jaxpr
with every parameter in exactly one `layer.Layer`. It keeps this contract: for every Kronecker
layer, every example and every cotangent at the output,

    sum over uses and positions of  input x cotangent^T  ==  d(output . cotangent) / d(weight).

The steps, a module each, and the records between them:

    model
      |  model_calls     calls by laplax's convention; what is wrong where one fails
    jaxpr
      |  complex_weights complex numbers that are made of parameters as their two parts
    jaxpr
      |  walk            index tracing (`values`, `index_rules`, `pullbacks`); rules of equations
      |                  (`arithmetic`, `biases`, `control_flow`), one `steps.Step` each
    uses.Findings        `Use`: an equation and the role of a parameter in it, weight or bias;
      |                  `Fallback`: parameters without a Kronecker form
      |  claims, biases  a use as matrices of distinct parameters, or why it is none
    claims.Claim
      |  groups          claims on the same ids are one layer; what overlaps otherwise is a fallback
      |  biases          a bias joins the weight that it shares all uses with
    grouping.Resolved    a `layer.Layer` and its `Member`s: claims, each with its joint bias
      |  program         the selection of parameters; the last layer alone
    program.Program

A use, a claim and a layer are three records, for they answer three questions: which equation (to
evaluate it), which matrix (to read inputs and cotangents in the layer's own layout), and which
block. A use may have several claims (parts of a padded weight), and a layer several uses. A
`Member` is a claim that knows the layer's bias; `segments.Segment` are its ids, as compactly as
they allow. Symbolic arrays and steps live as long as the walk.
"""
