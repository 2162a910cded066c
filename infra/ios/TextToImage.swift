// Text to image with the Core ML packages of a bundle, for iOS 17 or later. README.md explains it.
// A test of the repository evaluates the arithmetic between `// begin` and `// end` on test vectors.

import CoreGraphics
import CoreML
import Foundation

/// sampler.json, with the fields that an application needs.
struct Sampler: Decodable {
    struct Step: Decodable {
        let t: Int
        let fromZ: Float
        let fromOutput: Float
        let fromNoise: Float?

        enum CodingKeys: String, CodingKey {
            case t
            case fromZ = "from_z"
            case fromOutput = "from_output"
            case fromNoise = "from_noise"
        }
    }

    let steps: [Step]
    let guidance: Float
}

/// manifest.json, likewise.
struct Manifest: Decodable {
    struct Port: Decodable {
        let shape: [Int]
    }

    struct Module: Decodable {
        let files: [String]
        let inputs: [String: Port]
        let outputs: [String: Port]
    }

    struct Variant: Decodable {
        let modules: [String: Module]
    }

    let conditions: Int
    let variants: [String: Variant]
}

/// A module: one package, or two, of which the second takes the outputs of the first by name.
struct Program {
    let module: Manifest.Module
    let models: [MLModel]

    /// Opens the compiled packages, `.mlmodelc` instead of `.mlpackage`.
    init(_ module: Manifest.Module, in bundle: URL) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .cpuAndNeuralEngine
        var models: [MLModel] = []
        for file in module.files {
            let package = bundle.appendingPathComponent(file)
            let compiled = package.deletingPathExtension().appendingPathExtension("mlmodelc")
            models.append(try await MLModel.load(contentsOf: compiled, configuration: configuration))
        }
        self.module = module
        self.models = models
    }

    /// The module's output in C order. Core ML computes it in float16.
    func run(_ inputs: [String: MLFeatureValue]) throws -> [Float] {
        var values = inputs
        for model in models {
            let names = model.modelDescription.inputDescriptionsByName.keys
            let packageInputs = values.filter { names.contains($0.key) }
            let outputs = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: packageInputs))
            for name in outputs.featureNames {
                values[name] = outputs.featureValue(for: name)
            }
        }
        guard let name = module.outputs.keys.first, let output = values[name]?.multiArrayValue else {
            throw CocoaError(.featureUnsupported)
        }
        return MLShapedArray<Float>(converting: output).scalars
    }

    /// Values for a floating-point port other than `t`.
    func half(_ numbers: [Float], port: String) -> MLFeatureValue {
        let shape = module.inputs[port]!.shape
        return MLFeatureValue(shapedArray: MLShapedArray<Float16>(scalars: numbers.map { Float16($0) }, shape: shape))
    }
}

/// The caption's token ids, padded or truncated for the text encoder. `empty` are the ids of the empty caption in
/// vectors.json: start, end, then padding. `ids` come from the tokenizer, whether it truncates and pads or not.
func fitTokens(_ ids: [Int32], empty: [Int32]) -> [Int32] {
    let last = empty.count - 1
    let end = empty[1]
    let padding = empty[last]
    return empty.indices.map { i -> Int32 in
        // begin fitTokens
        let id = i >= ids.count ? padding : i == last && ids.count > empty.count ? end : ids[i]
        // end fitTokens
        return id
    }
}

/// Unit Gaussian noise. A seeded generator makes images reproducible.
func gaussian(_ count: Int, using generator: inout some RandomNumberGenerator) -> [Float] {
    (0..<count).map { _ -> Float in
        let u = 1 - Double.random(in: 0..<1, using: &generator)
        let v = Double.random(in: 0..<1, using: &generator)
        // begin gaussian
        let normal = sqrt(-2 * log(u)) * cos(2 * Double.pi * v)
        // end gaussian
        return Float(normal)
    }
}

/// The latent after a step (SnapFusion Eq. 2, 3). `outputs` are the UNet's for the empty caption, then the caption.
func advance(_ z: [Float], outputs: [Float], w: Float, step: Sampler.Step) -> [Float] {
    z.indices.map { i -> Float in
        // begin advance
        let uncond = outputs[i]
        let cond = outputs[z.count + i]
        let output = w * cond - (w - 1) * uncond
        let next = step.fromZ * z[i] + step.fromOutput * output
        // end advance
        return next
    }
}

/// The latent with the fresh noise that a step of the consistency sampler adds.
func renoise(_ z: [Float], fresh: [Float], fromNoise: Float) -> [Float] {
    z.indices.map { i -> Float in
        // begin renoise
        let next = z[i] + fromNoise * fresh[i]
        // end renoise
        return next
    }
}

/// An image [1,3,H,W] in 0 ... 1 as rows of bytes R, G, B, 255.
func rgba(_ image: [Float]) -> [UInt8] {
    let size = image.count / 3
    var bytes = [UInt8](repeating: 255, count: 4 * size)
    for i in 0..<size {
        for channel in 0..<3 {
            // begin rgba
            let level = (255 * image[channel * size + i]).rounded(.toNearestOrEven)
            bytes[4 * i + channel] = UInt8(max(0, min(255, level)))
            // end rgba
        }
    }
    return bytes
}

/// The condition c of the empty caption, then of the caption. The text encoder is closed when this returns.
func encode(_ rows: [[Int32]], variant: Manifest.Variant, in bundle: URL) async throws -> [Float] {
    let textEncoder = try await Program(variant.modules["text_encoder"]!, in: bundle)
    let shape = textEncoder.module.inputs["token_ids"]!.shape
    return try rows.flatMap { row -> [Float] in
        let ids = MLShapedArray<Int32>(scalars: row, shape: shape)
        return try textEncoder.run(["token_ids": MLFeatureValue(shapedArray: ids)])
    }
}

/// All steps, from noise to the latent. The UNet is closed when this returns.
func denoise(
    from noise: [Float], fresh: () -> [Float], c: [Float], sampler: Sampler, manifest: Manifest,
    variant: Manifest.Variant, in bundle: URL
) async throws -> [Float] {
    let unet = try await Program(variant.modules["unet"]!, in: bundle)
    // begin part: one call with both conditions, or one call for each
    let part = c.count / 2 * manifest.conditions
    // end part
    var z = noise
    for step in sampler.steps {
        let t = MLFeatureValue(shapedArray: MLShapedArray<Float>(scalars: [Float(step.t)], shape: [1]))
        let outputs = try stride(from: 0, to: c.count, by: part).flatMap { first -> [Float] in
            let condition = unet.half(Array(c[first..<first + part]), port: "c")
            return try unet.run(["z_t": unet.half(z, port: "z_t"), "t": t, "c": condition])
        }
        z = advance(z, outputs: outputs, w: sampler.guidance, step: step)
        if let fromNoise = step.fromNoise, fromNoise != 0 { z = renoise(z, fresh: fresh(), fromNoise: fromNoise) }
    }
    return z
}

/// The image for a caption, [1,3,H,W] in 0 ... 1.
///
/// - Parameters:
///   - ids: of the empty caption and of the caption, each from `fitTokens`.
///   - noise: unit Gaussian, as many values as the UNet's `z_t` has.
///   - fresh: gives as many again, for each step that adds noise.
///   - name: of the variant, such as "coreml".
///   - bundle: its folder, with the packages compiled.
func generate(
    ids: [[Int32]], noise: [Float], fresh: () -> [Float], variant name: String, in bundle: URL
) async throws -> [Float] {
    let manifest = try decode(Manifest.self, "manifest.json", in: bundle)
    let sampler = try decode(Sampler.self, "sampler.json", in: bundle)
    let variant = manifest.variants[name]!
    let c = try await encode(ids, variant: variant, in: bundle)
    let latent = try await denoise(
        from: noise, fresh: fresh, c: c, sampler: sampler, manifest: manifest, variant: variant, in: bundle)
    let decoder = try await Program(variant.modules["decoder"]!, in: bundle)
    return try decoder.run(["latent": decoder.half(latent, port: "latent")])
}

func decode<Value: Decodable>(_ type: Value.Type, _ name: String, in bundle: URL) throws -> Value {
    try JSONDecoder().decode(type, from: Data(contentsOf: bundle.appendingPathComponent(name)))
}

/// The bytes of `rgba` as an image to show.
func cgImage(_ bytes: [UInt8], width: Int, height: Int) -> CGImage? {
    guard let space = CGColorSpace(name: CGColorSpace.sRGB), let provider = CGDataProvider(data: Data(bytes) as CFData)
    else { return nil }
    return CGImage(
        width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32, bytesPerRow: 4 * width, space: space,
        bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue), provider: provider, decode: nil,
        shouldInterpolate: false, intent: .defaultIntent)
}
